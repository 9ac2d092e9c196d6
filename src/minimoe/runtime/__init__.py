"""Models in other programs, through one door: llama.cpp in this process. Needs no torch."""
