"""Published checkpoint formats, one file each."""
