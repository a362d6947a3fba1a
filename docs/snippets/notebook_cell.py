import aiotransfer as at

engine = await at.open_engine()
peer = await engine.connect(engine.address)
src, dst = engine.allocate(4096), engine.allocate(4096)
await engine.write(src, dst.descriptor)
await engine.aclose()
