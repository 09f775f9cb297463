"""Schedules requests through stages on devices; knows no model."""
