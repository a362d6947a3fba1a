"""The engine on asyncio: it waits, and nothing beneath it does."""
