"""Requests and their answers: scored, generated, stored."""
