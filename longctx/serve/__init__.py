"""Answer the requests of many clients with one model on its ranks, in the form of OpenAI's API."""
