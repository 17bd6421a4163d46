"""The work on packed pages, one file per kernel; each holds the plain-torch twin that specifies it."""
