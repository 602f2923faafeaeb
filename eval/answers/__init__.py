"""Requests to a model and their answers: scored, generated, stored."""
