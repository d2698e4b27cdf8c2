"""Studies: arms × seeds, where their cells run, and what the runs say."""
