from contextlib import asynccontextmanager
from fastapi import FastAPI
import aiotransfer as at


@asynccontextmanager
async def lifespan(app):
    async with at.open_engine() as app.state.engine:
        yield


app = FastAPI(lifespan=lifespan)
app.get("/address")(lambda: str(app.state.engine.address))
