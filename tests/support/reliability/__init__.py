"""What is done to a store on purpose, and what is measured meanwhile: in short by the tests, at length by a program."""
