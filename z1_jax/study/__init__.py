"""A table of many tasks as one program that resumes: a common SFT, RL from it in two forms, evaluations, one page."""
