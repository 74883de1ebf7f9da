"""Datasets of the project, one package each, in the form tensorflow-datasets expects."""
