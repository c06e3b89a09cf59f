//! Exports the variable through which a profiler reads a thread's trace (OTEP 4947): a reader
//! finds it among the executable's dynamic symbols, where a program's own are not otherwise.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=migrations");
    println!("cargo::rustc-link-arg-bins=-Wl,--export-dynamic-symbol=otel_thread_ctx_v1");
}
