"""Keyword biasing: lists, the spotter that hears which were spoken, and the phrases by which decoding is biased."""
