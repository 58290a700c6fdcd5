built_with_cuda: bool
max_svd_columns: int
overlap_block: int

def cuda_status() -> tuple[int, str]: ...
def cpu_isa() -> str: ...
def cpu_has_tiles() -> bool: ...
def split_project(
    u: int,
    x: int,
    coefficients: int,
    par: int,
    perp: int,
    batch: int,
    m: int,
    k: int,
    r: int,
    float64: bool,
    cuda: bool,
    stream: int,
) -> None: ...
def overlap(
    us: int,
    ut: int,
    partial: int,
    out: int,
    batch: int,
    m: int,
    ks: int,
    kt: int,
    float64: bool,
    cuda: bool,
    stream: int,
) -> None: ...
def overlap_tiles(ks: int, kt: int, float64: bool, cuda: bool) -> int: ...
def overlap_table(
    groups: int,
    table: int,
    edges: int,
    shells: int,
    count: int,
    blocks: int,
    strips: int,
    float64: bool,
    cuda: bool,
    stream: int,
) -> None: ...
def project_pair(
    us: int,
    ut: int,
    x: int,
    coefficients: int,
    split: int,
    moved: int,
    batch: int,
    m: int,
    ks: int,
    kt: int,
    r: int,
    float64: bool,
    cuda: bool,
    stream: int,
) -> None: ...
def panel_qr(
    panel: int,
    q: int,
    l: int,
    rank: int,
    scratch: int,
    batch: int,
    r: int,
    m: int,
    float64: bool,
    cuda: bool,
    stream: int,
) -> None: ...
def panel_qr_scratch(r: int) -> int: ...
def small_svd(
    a: int,
    u: int,
    s: int,
    v: int,
    scratch: int,
    batch: int,
    m: int,
    n: int,
    float64: bool,
    cuda: bool,
    stream: int,
) -> None: ...
def small_svd_scratch(batch: int, m: int, n: int, float64: bool, cuda: bool) -> int: ...
