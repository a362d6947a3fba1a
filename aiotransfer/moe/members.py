"""Stub."""
import msgspec
class View(msgspec.Struct, frozen=True, array_like=True):
    next: int
class Members:
    def __init__(self, rank, incarnations, *, slots, start=0):
        self.gone=frozenset(); self.audience=(); self.settled=True; self.evicted=False; self.start=0
    def lose(self,r): return False
    def join(self,r,i): pass
    def hear(self,r,v): pass
    def owes(self): return False
    def limit(self): return None
    def header(self,s,r): return None
    def takes_part(self,s,r): return True
