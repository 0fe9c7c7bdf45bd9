"""What dltrain runs on: a lab of several hosts on one machine."""
