"""Guards of the adapter for vLLM."""

from __future__ import annotations

from tests.guards.mutant import Mutant

WEIGHTS = "tests/integrations/vllm/test_weights.py"
PACKAGES = "tests/integrations/test_packages.py"
FIELDS, FOLDER = "aiotransfer/integrations/vllm/fields.py", "aiotransfer/integrations/vllm/weights"
GUARDS = (
    Mutant(
        "vllm: a vLLM without the interface", FIELDS, "    except ImportError:\n        return\n",
        "    except ImportError:\n        raise\n", PACKAGES,
    ),
    Mutant("vllm: registered once", FIELDS, 'backend not in getattr(registry, "_registry", {})', "True", PACKAGES),
    Mutant(
        "vllm: a reload ends after an error, too", f"{FOLDER}/worker.py", "    finally:\n        # After",
        "    except ZeroDivisionError:\n        # After", WEIGHTS,
    ),
    Mutant(
        "vllm: parameters that nothing fills", f"{FOLDER}/worker.py", "sorted(wanted - filled - tied.keys())", "()", WEIGHTS,
    ),
    Mutant(
        "vllm: layers of which a part came", f"{FOLDER}/worker.py",
        "            missing |= fields.half_filled(model, model_config)\n", "", WEIGHTS,
    ),
    Mutant(
        "vllm: a tied head is packed again", f"{FOLDER}/worker.py",
        "        fields.pack_again(layer)\n", "        pass\n", WEIGHTS,
    ),
    Mutant(
        "vllm: the version that the trainer named", f"{FOLDER}/receiver.py", "            if present != wanted:\n",
        "            if False:\n", WEIGHTS,
    ),
    Mutant(
        "vllm: a version is let go", f"{FOLDER}/receiver.py", "            self._thread.run(stack.aclose())\n",
        "            pass\n", WEIGHTS,
    ),
    Mutant(
        "vllm: workers hear that a failed update is over", f"{FOLDER}/trainer.py",
        "                self.client.finish_weight_update()\n", "                pass\n", WEIGHTS,
    ),
    Mutant(
        "vllm: parameters that were replaced", f"{FOLDER}/trainer.py", "        if is_other:\n", "        if False:\n", WEIGHTS,
    ),
    Mutant(
        "vllm: a client that fails", f"{FOLDER}/trainer.py", "            made.shutdown()\n            raise\n",
        "            raise\n", WEIGHTS,
    ),
    Mutant(
        "vllm: a source keeps to its metadata", f"{FOLDER}/messages.py",
        "        if name in given and given[name] != wanted[name]:\n", "        if False:\n", WEIGHTS,
    ),
    Mutant("vllm: a timeout of a trainer", f"{FOLDER}/messages.py", "not 0 < value <= MOST_SECONDS", "False", WEIGHTS),
)
