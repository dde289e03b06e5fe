"""Code shared by searches and trainings: settings, command line, the loop over epochs, checkpoints, tables, reports."""
