"""Races: actors that take turns on shared tables, the search through their interleavings, the scenarios shipped."""
