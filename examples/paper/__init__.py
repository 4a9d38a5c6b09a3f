"""The settings of the MaTS paper, as recipes."""
