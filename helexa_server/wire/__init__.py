"""Wire formats. Each parses a body into :class:`GenerateRequest` and projects the engine's events back; none knows HTTP."""
