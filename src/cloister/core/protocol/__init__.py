"""The messages that cross a trust boundary, as types with one canonical encoding."""
