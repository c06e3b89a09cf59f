//! Builds the BPF programs with the first of these compilers that this machine has:
//!
//! - Debian's stable rustc with a precompiled `core` for BPF (packages `rustc-web` and
//!   `libstd-rust-web-dev-bpf`), at `/usr/bin/rustc`;
//! - the toolchain `nightly` of rustup with the component `rust-src`.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use aya_build::{Package, Toolchain};

/// Path of Debian's compiler.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

fn main() -> Result<()> {
    same_programs_in_every_build();
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("../agent-ebpf");
    let root_dir = root
        .to_str()
        .context("the path of agent-ebpf is not UTF-8")?;
    ensure!(
        find_in_path("bpf-linker"),
        "bpf-linker is not on PATH: run `make setup` (or `cargo install bpf-linker`)"
    );
    let package = Package {
        name: "agent-ebpf",
        root_dir,
        features: &["programs"],
        ..Package::default()
    };
    let toolchain = if debian_has_core_for_bpf() {
        // aya-build runs `cargo` of the stable toolchain. `CARGO_BUILD_RUSTC` makes that cargo
        // run Debian's compiler, and `RUSTC_BOOTSTRAP` lets the one crate that needs it use an
        // unstable feature (inline assembly for BPF).
        // SAFETY: the build script has no other thread.
        unsafe {
            env::set_var("CARGO_BUILD_RUSTC", DEBIAN_RUSTC);
            env::set_var("RUSTC_BOOTSTRAP", "aya_ebpf");
        }
        Toolchain::Custom("stable")
    } else {
        Toolchain::Nightly
    };
    aya_build::build_ebpf([package], toolchain).context(
        "the kernel programs were not built: run `make setup`, which installs Debian's rustc-web and \
         libstd-rust-web-dev-bpf (or: rustup toolchain install nightly --component rust-src)",
    )
}

/// Removes settings that would make the BPF programs differ from those of a clean build. The
/// verifier judges instructions, and may accept the output of one build and reject that of another.
fn same_programs_in_every_build() {
    let overrides: Vec<_> = env::vars_os()
        .map(|(name, _)| name)
        .filter(|name| {
            name.to_str()
                .is_some_and(|name| name.starts_with("CARGO_PROFILE_RELEASE_"))
        })
        .collect();
    // SAFETY: the build script has no other thread.
    unsafe {
        for name in overrides {
            env::remove_var(name);
        }
        env::set_var("CARGO_INCREMENTAL", "0");
    }
}

/// Whether Debian's compiler is installed together with `core` for BPF.
fn debian_has_core_for_bpf() -> bool {
    println!("cargo:rerun-if-changed={DEBIAN_RUSTC}");
    if !Path::new(DEBIAN_RUSTC).exists() {
        return false;
    }
    let output = Command::new(DEBIAN_RUSTC)
        .args(["--print", "target-libdir", "--target", "bpfel-unknown-none"])
        .output();
    let Ok(output) = output else { return false };
    let directory = String::from_utf8_lossy(&output.stdout);
    Path::new(directory.trim()).is_dir()
}

fn find_in_path(program: &str) -> bool {
    env::var_os("PATH")
        .is_some_and(|paths| env::split_paths(&paths).any(|dir| dir.join(program).is_file()))
}
