"""The configuration of a run: YAML, environment and key=value in, frozen sections out."""
