"""What surrounds a run: its flags, the machine, its folder, what it prints."""
