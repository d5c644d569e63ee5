"""HTTP in front of :mod:`helexa_engine`: OpenAI-compatible routes over Starlette. Never touches a tensor."""
