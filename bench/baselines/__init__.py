"""Published code that this project is compared with, restated."""
