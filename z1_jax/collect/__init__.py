"""Makes datasets of demonstrations: of our scripted experts, or of other people's files."""
