"""Callbacks for trainers of other libraries: ``integrations.lightning`` and ``integrations.transformers``.

Nothing is imported here, so that ``import proxopt_torch`` needs neither library.
"""
