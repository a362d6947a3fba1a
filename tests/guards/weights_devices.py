"""Guards of weights on a GPU."""

from __future__ import annotations

from tests.guards.mutant import Mutant

GUARDS = (
    Mutant(
        "weights: kernels that fill a GPU's weights are waited for", "aiotransfer/weights/publisher/update.py",
        "        await context.sources.finished()\n", "", "tests/weights/test_devices.py",
    ),
    Mutant(
        "weights: what the GPU converts is waited for", "aiotransfer/weights/publisher/on_gpu.py",
        "            gpu.kernels.finish()\n", "", "tests/weights/test_on_gpu.py",
    ),
    Mutant(
        "weights: memory of a GPU is part of the staging memory", "aiotransfer/weights/publisher/work.py",
        "        return max(lent - self.on_gpu_bytes, 1)\n", "        return max(lent, 1)\n", "tests/weights/test_on_gpu.py",
    ),
    Mutant(
        "weights: a slab takes no more memory of the GPU than there is", "aiotransfer/weights/memory/box.py",
        "        if self.nbytes(shape) <= most:\n", "        if self.nbytes(shape) <= 2 * most:\n",
        "tests/weights/test_on_gpu.py",
    ),
    Mutant(
        "weights: memory of a GPU is given back when an update has ended", "aiotransfer/weights/publisher/making.py",
        "        self._context.sources.on_gpu.release()\n", "", "tests/weights/test_on_gpu.py",
    ),
    Mutant(
        "weights: a Triton that cannot be imported leaves the host to convert", "aiotransfer/weights/publisher/on_gpu.py",
        "            except Exception as error:  # one of them is", "            except ValueError as error:  # one of them is",
        "tests/weights/test_on_gpu.py",
    ),
    Mutant(
        "weights: a GPU whose kernels failed is not asked again", "aiotransfer/weights/publisher/on_gpu.py",
        "            self._gpus[source.ordinal] = None\n            self._say(source.device, error)\n            return False\n",
        "            raise\n", "tests/weights/test_on_gpu.py",
    ),
    Mutant(
        "weights: kernels that read a GPU's weights are waited for", "aiotransfer/weights/subscriber/ondevice.py",
        "        await self._devices.finished()\n", "", "tests/weights/test_devices.py",
    ),
    Mutant(
        "weights: what was counted is stored on the GPU before it opens", "aiotransfer/weights/subscriber/session.py",
        "        await self._context.memory.put()\n", "", "tests/weights/test_devices.py",
    ),
    Mutant(
        "weights: only tensors are stored on a GPU", "aiotransfer/weights/subscriber/ondevice.py",
        "buffer.write_runs([(at, memory[at : at + n]) for at, n in runs])", "buffer.write_runs([(0, memory)])",
        "tests/weights/test_devices.py",
    ),
    Mutant(
        "weights: host memory that was written since is not lent as the version", "aiotransfer/weights/subscriber/lending.py",
        "        elif context.memory.stale:\n", "        elif False:\n", "tests/weights/test_devices.py",
    ),
    Mutant(
        "weights: a part of the names is added to what the GPU has", "aiotransfer/weights/subscriber/ondevice.py",
        "        if part and not self._is_copy:\n", "        if False:\n", "tests/weights/test_devices.py",
    ),
    Mutant(
        "weights: what a NIC wrote on a GPU is seen before it opens", "aiotransfer/weights/subscriber/ondevice.py",
        "                await region.flush()\n", "                pass\n", "tests/weights/test_devices_direct.py",
    ),
    Mutant(
        "weights: what is converted is first brought from a GPU", "aiotransfer/weights/planning/planner.py",
        "        if self.staged or self.apart:\n", "        if self.staged:\n", "tests/weights/test_devices_direct.py",
    ),
    Mutant(
        "weights: copies that are lent fit beside the staging memory", "aiotransfer/weights/publisher/borrowing.py",
        "        if needed > self._works.staging_bytes:\n", "        if False:\n", "tests/weights/test_devices.py",
    ),
    Mutant(
        "weights: staging memory that was pinned is unpinned", "aiotransfer/weights/publisher/work.py",
        "        self._context.sources.devices.unpin()\n", "", "tests/weights/test_devices.py",
    ),
)
