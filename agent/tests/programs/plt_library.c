// The library of plt.c: 64 functions that do almost nothing, so that the PLT entries before them take a
// noticeable share of the time.
#define ENTRY(name) \
    __attribute__((noipa)) long entry_##name(long value) { return value + 0x##name; }
#define ROW(x) \
    ENTRY(x##0) ENTRY(x##1) ENTRY(x##2) ENTRY(x##3) ENTRY(x##4) ENTRY(x##5) ENTRY(x##6) ENTRY(x##7) \
    ENTRY(x##8) ENTRY(x##9) ENTRY(x##a) ENTRY(x##b) ENTRY(x##c) ENTRY(x##d) ENTRY(x##e) ENTRY(x##f)
ROW(1) ROW(2) ROW(3) ROW(4)
