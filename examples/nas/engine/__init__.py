"""What searches and trainings share: settings, command line, the loop over epochs, checkpoints, tables, reports."""
