"""Stub."""
from aiotransfer.providers import rows
class CpuKernels:
    device="cpu"
    move=staticmethod(rows.move); weigh=staticmethod(rows.weigh)
    def place(self,a): return a
    async def settle(self,timeout=None): pass
