"""Twenty architectures whose coupled units are set to zero, for `compaction.py` and tests/torch/zoo.

Every model is built from a configuration with random weights; nothing is downloaded. timm and transformers are imported when a
model is built. Most models are small: what matters is how the layers are connected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Inputs = tuple[Tensor, ...] | dict[str, Tensor]

CLASSES = 10
VOCABULARY = 100


@dataclass(frozen=True)
class Cut:
    """A dimension of some parameters that loses every second unit.

    Args:
      pattern: regular expression of the whole names of the parameters.
      dim: their dimension.
      width: number of consecutive indices that belong to one unit, such as the size of an attention head.
      zero: whether the entries are set to zero. Those that only read the units stay as they are.
    """

    pattern: str
    dim: int
    width: int = 1
    zero: bool = True

    def removed(self, size: int) -> Tensor:
        """The indices of the units to remove in a dimension of this size."""
        if size % (2 * self.width):
            raise ValueError(f"{self.pattern}: size must be a multiple of twice the width {self.width}, got {size}")
        return (torch.arange(size) // self.width % 2).nonzero()[:, 0]


@dataclass(frozen=True)
class Architecture:
    """A model, the units that are removed from it, and inputs.

    Args:
      name: as in the table.
      units: what is removed, in words.
      build: the model.
      cuts: those of a model.
      inputs: random inputs of a batch size.
      narrower: builds the same architecture without the removed units, where its configuration allows it.
      full_size: whether it is a model of the size in use, which takes seconds; the tests leave it out.
    """

    name: str
    units: str
    build: Callable[[], nn.Module]
    cuts: Callable[[nn.Module], list[Cut]]
    inputs: Callable[[int], Inputs]
    narrower: Callable[[], nn.Module] | None = None
    full_size: bool = False

    def pruned(self, seed: int = 0) -> tuple[nn.Module, int]:
        """A model in eval mode with zeroed units, and the number of parameters that belong to these units."""
        torch.manual_seed(seed)
        model = self.build().eval()
        randomise(model)
        saved = zero_units(model, self.cuts(model))
        calibrate(model, self.inputs(4))
        return model, saved


def size(model: nn.Module) -> int:
    """Number of parameters, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Draw the parameters that are constant in a new model, so that no unit is zero by chance."""
    for name, p in model.named_parameters():
        if p.dim() == 1 and "bias" in name:
            p.normal_(0, 0.1)
        elif p.dim() == 1:
            p.uniform_(0.5, 1.5)
        elif not p.any():
            p.normal_(0, 0.1)


@torch.no_grad()
def calibrate(model: nn.Module, inputs: Inputs) -> None:
    """Set the running statistics of batch norms to those of these inputs.

    With other statistics the signal vanishes in a deep network, and a comparison of outputs would show nothing.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if norms:
        usual = norms[0].momentum
        for norm in norms:
            norm.momentum = 1.0
        run(model.train(), inputs)
        for norm in norms:
            norm.momentum = usual
        model.eval()


@torch.no_grad()
def zero_units(model: nn.Module, cuts: list[Cut]) -> int:
    """Set the units of the cuts to zero; the number of parameters that a model without them saves."""
    saved, matched = 0, set()
    for name, p in model.named_parameters():
        left = list(p.shape)
        for cut in cuts:
            if re.fullmatch(cut.pattern, name):
                matched.add(cut)
                removed = cut.removed(p.shape[cut.dim])
                left[cut.dim] -= len(removed)
                if cut.zero:
                    p.index_fill_(cut.dim, removed, 0)
        saved += p.numel() - torch.Size(left).numel()
    if missing := [c.pattern for c in cuts if c not in matched]:
        raise ValueError(f"cuts: {missing} match no parameter of {type(model).__name__}")
    return saved


def tensors(outputs: Any) -> Iterator[Tensor]:
    """The tensors of the outputs of a model; caches of keys and values are left out."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, dict):
        yield from tensors(list(outputs.values()))
    elif isinstance(outputs, (tuple, list)):
        for output in outputs:
            yield from tensors(output)


@torch.no_grad()
def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The outputs for these inputs, always with the same random numbers."""
    torch.manual_seed(0)
    return list(tensors(model(**inputs) if isinstance(inputs, dict) else model(*inputs)))


def gap(model: nn.Module, other: nn.Module, inputs: Inputs) -> float:
    """Largest difference of the outputs of two models, over the largest output."""
    pairs = list(zip(run(model, inputs), run(other, inputs), strict=True))
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs)


# -- which units --------------------------------------------------------------------------------------


def every_channel(model: nn.Module) -> list[Cut]:
    """Every second channel of all convolutions and batch norms, but for those of the image and the classes."""
    cuts = []
    for name, m in model.named_modules():
        named = lambda parameter, dim, zero, name=name: Cut(re.escape(f"{name}.{parameter}"), dim, zero=zero)
        if isinstance(m, (nn.Conv2d, nn.modules.batchnorm._BatchNorm)):
            cuts += [named(p, 0, True) for p, _ in m.named_parameters(recurse=False)]
        if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1 and m.in_channels > 3):
            cuts.append(named("weight", 1, False))
    return cuts


def mlp_units(layer: str, first: str = "fc1", second: str = "fc2", conv1d: bool = False) -> list[Cut]:
    """Hidden units of the MLPs of a pattern; with the (inputs, outputs) weights of `transformers.pytorch_utils.Conv1D` or not."""
    cuts = [Cut(rf"{layer}\.{first}\.weight", int(conv1d)), Cut(rf"{layer}\.{second}\.weight", 1 - conv1d, zero=False)]
    return cuts if "gate" in first or first == "wi" else [*cuts, Cut(rf"{layer}\.{first}\.bias", 0)]


def regnet_cuts(_: nn.Module) -> list[Cut]:
    whole = partial(Cut, width=8)  # the groups of a grouped convolution
    return [
        Cut(r"stem\.\w+\.\w+|.*\.(conv3|downsample)\.\w+\.\w+|.*\.fc1\.\w+", 0),
        Cut(r".*\.(conv1|downsample)\.conv\.weight|.*\.fc2\.weight|head\.fc\.weight", 1, zero=False),
        whole(r".*\.(conv1|conv2)\.\w+\.\w+|.*\.fc2\.\w+", 0),
        whole(r".*\.(conv3\.conv|fc1)\.weight", 1, zero=False),
    ]


def attention_heads(rows: str, columns: str, width: int) -> list[Cut]:
    """Heads whose outputs are not read: zero columns of the output projection; queries, keys and values are nonzero."""
    return [Cut(rows, 0, width, zero=False), Cut(columns, 1, width)]


def t5_cuts(_: nn.Module) -> list[Cut]:
    heads = attention_heads(r".*Attention\.[qkv]\.weight", r".*Attention\.o\.weight", 16)
    return [*heads, Cut(r".*relative_attention_bias\.weight", 1, zero=False), *mlp_units(".*DenseReluDense", "wi", "wo")]


def gpt2_cuts(_: nn.Module) -> list[Cut]:
    heads = [Cut(r".*c_attn\.weight", 1, 16, False), Cut(r".*c_attn\.bias", 0, 16, False), Cut(r".*attn\.c_proj\.weight", 0, 16)]
    return [*heads, *mlp_units(r".*\.mlp", "c_fc", "c_proj", conv1d=True)]


def llama_cuts(_: nn.Module) -> list[Cut]:
    """Groups of two heads with their key-value head; hidden units with a zero row of the gate alone."""
    queries = attention_heads(r".*q_proj\.weight", r".*o_proj\.weight", 16)
    mlp = [*mlp_units(r".*\.mlp", "gate_proj", "down_proj"), Cut(r".*up_proj\.weight", 0, zero=False)]
    return [*queries, Cut(r".*[kv]_proj\.weight", 0, 8, zero=False), *mlp]


# -- models of our own --------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A two-layer bidirectional LSTM that classifies texts."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.lstm = nn.LSTM(32, hidden, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0].mean(1))


class TiedLanguageModel(nn.Module):
    """A language model of GRUs around a residual stream; the embedding is also the weight of the output layer."""

    def __init__(self, width: int = 64, hidden: int = 96) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.gru = nn.ModuleList(nn.GRU(width, hidden, batch_first=True) for _ in range(2))
        self.mix = nn.ModuleList(nn.Linear(hidden, width) for _ in range(2))
        self.decoder = nn.Linear(width, VOCABULARY)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for gru, mix in zip(self.gru, self.mix):
            x = x + mix(gru(x)[0])
        return self.decoder(x)


class DoubleConv(nn.Sequential):
    def __init__(self, width: int, out: int) -> None:
        layers = (nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU())
        super().__init__(*layers, nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


class UNet(nn.Module):
    """Three levels, with skip connections by concatenation."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = DoubleConv(3, width), DoubleConv(width, 2 * width), DoubleConv(2 * width, 4 * width)
        self.grow2, self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), DoubleConv(4 * width, 2 * width)
        self.grow1, self.up1 = nn.ConvTranspose2d(2 * width, width, 2, 2), DoubleConv(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        up = self.grow2(self.bottom(F.max_pool2d(two, 2)))
        up = self.grow1(self.up2(torch.cat([two, up], 1)))
        return self.head(self.up1(torch.cat([one, up], 1)))


class VAE(nn.Module):
    """A variational autoencoder of images of 28 x 28, with a reshape between a Linear layer and a convolution."""

    def __init__(self, width: int = 16, latent: int = 8) -> None:
        super().__init__()
        self.channels = 2 * width
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(), nn.Flatten()
        )
        self.mean, self.log_var = nn.Linear(2 * width * 49, latent), nn.Linear(2 * width * 49, latent)
        self.expand = nn.Linear(latent, 2 * width * 49)
        self.grow, self.head = nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.ConvTranspose2d(width, 1, 4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(x)
        mean, log_var = self.mean(h), self.log_var(h)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_var)
        h = F.relu(self.expand(z)).view(-1, self.channels, 7, 7)
        return torch.sigmoid(self.head(F.relu(self.grow(h)))), mean, log_var


def lstm_cuts(_: nn.Module) -> list[Cut]:
    return [Cut(r"lstm\..*", 0), Cut(r"lstm\.weight_(hh_l.|ih_l1).*|head\.weight", 1, zero=False)]


def tied_cuts(_: nn.Module) -> list[Cut]:
    stream = [Cut(r"embedding\.weight", 1), Cut(r"mix\.\d\..*", 0), Cut(r"gru\.\d\.weight_ih_l0", 1, zero=False)]
    return [*stream, Cut(r"gru\..*", 0), Cut(r"gru\.\d\.weight_hh_l0|mix\.\d\.weight", 1, zero=False)]


def unet_cuts(model: nn.Module) -> list[Cut]:
    """A transposed convolution has the weight (inputs, outputs, height, width)."""
    convolutions = [c for c in every_channel(model) if not c.pattern.startswith("head")]
    grown = [Cut(r"grow\d\.weight", 1), Cut(r"grow\d\.bias", 0), Cut(r"grow\d\.weight", 0, zero=False)]
    return [*convolutions, *grown, Cut(r"head\.weight", 1, zero=False)]


def vae_cuts(_: nn.Module) -> list[Cut]:
    encoder = [Cut(r"encoder\..*", 0), Cut(r"encoder\.2\.weight", 1, zero=False)]
    latent = [Cut(r"(mean|log_var)\.weight", 1, 49, zero=False), Cut(r"expand\..*", 0, 49)]
    return [*encoder, *latent, Cut(r"(grow|head)\.weight", 0, zero=False), Cut(r"grow\.weight", 1), Cut(r"grow\.bias", 0)]


# -- the table ----------------------------------------------------------------------------------------


def declare_operators_of_torchvision() -> None:
    """Let torchvision be imported where its compiled operators are missing: its wheels do not match torch for CPUs.

    It registers the gradients of two of them when it is imported, so that these must be declared. No model uses them. timm,
    transformers and, through torchmetrics, Lightning import torchvision where it is installed.
    """
    try:
        import torchvision  # noqa: F401, only to see whether it works
    except ModuleNotFoundError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        DECLARED.append(library)  # its destructor would undo the declarations


def import_timm() -> Any:
    """timm, also where the compiled operators of torchvision are missing."""
    declare_operators_of_torchvision()
    import timm

    return timm


DECLARED: list[torch.library.Library] = []


def timm_model(name: str, **options: Any) -> nn.Module:
    return import_timm().create_model(name, num_classes=CLASSES, pretrained=False, **options)


def from_timm(module: str, name: str, *args: Any, **options: Any) -> nn.Module:
    """A class of `timm.models` with another configuration than those that have a name."""
    import_timm()
    return getattr(__import__(f"timm.models.{module}", fromlist=[name]), name)(*args, num_classes=CLASSES, **options)


def regnet() -> nn.Module:
    import_timm()
    from timm.models.regnet import RegNetCfg

    config = RegNetCfg(depth=6, w0=32, wa=40, wm=2.0, group_size=8, stem_width=16, se_ratio=0.25)
    return from_timm("regnet", "RegNet", config)


def vgg() -> nn.Module:
    stages = [16, "M", 32, "M", 64, 64, "M"]
    return from_timm("vgg", "VGG", stages, norm_layer=nn.BatchNorm2d, mlp_ratio=1 / 16)


def from_transformers(model: str, config: str, **options: Any) -> nn.Module:
    """A class of transformers; the tokens that begin and end a text must lie in the small vocabulary."""
    import_timm()  # transformers imports torchvision where it is installed
    import transformers

    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return getattr(transformers, model)(getattr(transformers, config)(vocab_size=VOCABULARY, **special, **options))


def encoder(hidden: int = 128) -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, hidden, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def images(batch: int, channels: int = 3, side: int = 64) -> tuple[Tensor, ...]:
    return (torch.randn(batch, channels, side, side),)


def vectors(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 7 + batch, 64),)


def tokens(batch: int) -> tuple[Tensor, ...]:
    return (torch.randint(VOCABULARY, (batch, 7 + batch)),)


def named_tokens(batch: int, *others: str) -> dict[str, Tensor]:
    """Texts of a length that grows with the batch size, as keyword arguments."""
    return {name: tokens(batch)[0] for name in ("input_ids", *others)}


def masked_tokens(batch: int) -> dict[str, Tensor]:
    ids = named_tokens(batch)
    mask = torch.ones_like(ids["input_ids"])
    mask[:, -2:] = 0
    return {**ids, "attention_mask": mask}


MIXER = partial(from_timm, "mlp_mixer", "MlpMixer", img_size=64, num_blocks=2, embed_dim=64)
SWIN = partial(
    from_timm, "swin_transformer", "SwinTransformer", img_size=64, embed_dim=32, depths=(2, 2), head_dim=16, window_size=4
)
VIT = partial(from_timm, "vision_transformer", "VisionTransformer", img_size=64, embed_dim=64, depth=2, num_heads=4)
CONVNEXT = partial(from_timm, "convnext", "ConvNeXt", depths=(1, 1, 1, 1), dims=(16, 32, 64, 128), ls_init_value=1.0)
DENSENET = partial(from_timm, "densenet", "DenseNet", block_config=(6, 12, 24, 16))
BERT = partial(from_transformers, "BertModel", "BertConfig", hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
GPT2 = partial(from_transformers, "GPT2LMHeadModel", "GPT2Config", n_embd=64, n_layer=2, n_head=4)
T5 = partial(from_transformers, "T5ForConditionalGeneration", "T5Config", d_model=64, d_kv=16, num_layers=2)
LLAMA = partial(from_transformers, "LlamaForCausalLM", "LlamaConfig", hidden_size=64, num_hidden_layers=2, head_dim=8)

ALL = "all channels"
HEADS = "heads, MLP units"

ARCHITECTURES = [
    Architecture("ResNet-18", ALL, partial(timm_model, "resnet18"), every_channel, images, full_size=True),
    Architecture("ResNet-50", ALL, partial(timm_model, "resnet50"), every_channel, images, full_size=True),
    Architecture("RegNet", "all channels, whole groups", regnet, regnet_cuts, images),
    Architecture("MobileNetV3", ALL, partial(timm_model, "mobilenetv3_small_050"), every_channel, images),
    Architecture("EfficientNet", ALL, partial(timm_model, "efficientnet_b0"), every_channel, images, full_size=True),
    Architecture(
        "DenseNet-121",
        ALL,
        DENSENET,
        every_channel,
        images,
        partial(DENSENET, growth_rate=16),
        full_size=True,
    ),
    Architecture("ConvNeXt", "MLP units", CONVNEXT, lambda _: mlp_units(r".*\.mlp"), images),
    Architecture("VGG", ALL, vgg, every_channel, images),
    Architecture(
        "MLP-Mixer",
        "units of both MLPs",
        MIXER,
        lambda _: mlp_units(r".*\.mlp_\w+"),
        images,
        partial(MIXER, mlp_ratio=(0.25, 2.0)),
    ),
    Architecture(
        "Swin",
        HEADS,
        partial(SWIN, num_heads=(2, 4)),
        lambda _: [
            *attention_heads(r".*\.qkv\.\w+", r".*\.attn\.proj\.weight", 16),
            Cut(r".*relative_position_bias_table", 1, zero=False),
            *mlp_units(r".*\.mlp"),
        ],
        images,
        partial(SWIN, num_heads=(1, 2), mlp_ratio=2.0),
    ),
    Architecture(
        "ViT",
        HEADS,
        VIT,
        lambda _: [*attention_heads(r".*\.qkv\.\w+", r".*\.attn\.proj\.weight", 16), *mlp_units(r".*\.mlp")],
        images,
    ),
    Architecture(
        "BERT",
        HEADS,
        partial(BERT, intermediate_size=128),
        lambda _: [
            *attention_heads(r".*(query|key|value)\.\w+", r".*attention\.output\.dense\.weight", 16),
            *mlp_units(r".*layer\.\d", r"intermediate\.dense", r"output\.dense"),
        ],
        masked_tokens,
    ),
    Architecture("GPT-2", HEADS, GPT2, gpt2_cuts, named_tokens),
    Architecture(
        "T5",
        HEADS,
        partial(T5, num_heads=4, d_ff=128),
        t5_cuts,
        lambda batch: named_tokens(batch, "decoder_input_ids"),
        partial(T5, num_heads=2, d_ff=64),
    ),
    Architecture(
        "Llama",
        "groups of heads, gated MLP units",
        partial(LLAMA, num_attention_heads=8, num_key_value_heads=4, intermediate_size=128),
        llama_cuts,
        named_tokens,
        partial(LLAMA, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64),
    ),
    Architecture(
        "TransformerEncoder",
        HEADS,
        encoder,
        lambda _: [
            *attention_heads(r".*in_proj_\w+", r".*out_proj\.weight", 16),
            *mlp_units(r"layers\.\d", "linear1", "linear2"),
        ],
        vectors,
    ),
    Architecture("LSTM", "hidden units", Recurrent, lstm_cuts, tokens, partial(Recurrent, 32)),
    Architecture("UNet", ALL, UNet, unet_cuts, images, partial(UNet, 8)),
    Architecture("VAE", "channels of both halves", VAE, vae_cuts, lambda batch: images(batch, 1, 28), partial(VAE, 8)),
    Architecture(
        "tied language model", "embedding, hidden units", TiedLanguageModel, tied_cuts, tokens, partial(TiedLanguageModel, 32, 48)
    ),
]
