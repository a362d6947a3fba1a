import asyncio
import aiotransfer as at


async def main():
    async with at.open_engine() as a, at.open_engine() as b:
        peer, src, dst = await a.connect(b.address), a.allocate(4096), b.allocate(4096)
        await a.write(src, dst.descriptor, imm=1)
        await b.counter(imm=1).wait(1)
        print(f"{peer.path.provider}: {dst.numpy().nbytes} bytes have landed")


asyncio.run(main())
