"""The sections of the GPU check, the most important first, each with its weight in the division of the time."""

from recipes.gpu import decode, device, launches, longest, medium, parity, prefill, train, tuning
from recipes.gpu.bench import Section

SECTIONS: dict[str, Section] = {
    "device": Section(device.jobs, 0.06),
    "parity": Section(parity.jobs, 0.24),
    "decode": Section(decode.jobs, 0.2),
    "prefill": Section(prefill.jobs, 0.2),
    "train": Section(train.jobs, 0.12),
    "launches": Section(launches.jobs, 0.08),
    "tuning": Section(tuning.jobs, 0.1),
    "longest": Section(longest.jobs, 0.04),
    "benchmark": Section(medium.jobs, 0.12),
}
