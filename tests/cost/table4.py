"""Published measurements of arXiv 2411.01783: Llama 3 405B on 4 hosts of 8 H100."""

from longctx.cost.attention import Work
from longctx.cost.hardware import Hardware, Link

# P, T, TTFT in ms by pass-KV and by pass-Q (Table 4)
TABLE_4 = [
    (126720, 1280, 1023.39, 898.71),
    (124800, 3200, 1110.18, 1046.43),
    (123840, 4160, 1298.92, 1280.1),
    (121600, 6400, 1305.56, 1302.01),
    (115200, 12800, 2080.67, 2205.27),
    (102400, 25600, 3353.02, 3617.02),
    (89600, 38400, 4629.23, 4922.52),
    (76800, 51200, 5745.08, 6217.83),
    (64000, 64000, 6845.21, 7367.99),
    (51200, 76800, 7890.35, 8468.66),
    (38400, 89600, 8697.27, 9666.62),
    (25600, 102400, 10105.78, 10652.39),
    (12800, 115200, 11136.4, 11571.62),
    (0, 128000, 11462.15, 12360.57),
]


def work(t: int, p: int, ranks: int = 4) -> Work:
    """Return the work of one GPU of eight: 16 query heads and 1 KV head of dimension 128, in bf16."""
    return Work((t,), (p,), ranks, heads=16, kv_heads=1, head_dim=128, element_bytes=2)


def gpu(tflops: float, gigabytes: float, exchange_gigabytes: float = 23.0) -> Hardware:
    """Return a GPU of these TFLOP/s, and GB/s of the ring's hop and of the all-to-all."""
    link = Link(0.0, gigabytes * 1e9)
    exchange = Link(0.0, exchange_gigabytes * 1e9)
    return Hardware(tflops * 1e12, 1.5e12, 0.0, link, exchange, overlap=1.0)


PEAKS, ACHIEVED = gpu(800, 50), gpu(515, 26)
