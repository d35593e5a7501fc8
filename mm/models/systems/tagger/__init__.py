"""An audio encoder with a head that says what a recording is: one label of several, or any number of tags."""
