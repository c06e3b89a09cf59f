//! Prints what the unwind tables of files come to: `cargo run --release --example tables FILE…`

use flamestorm::object::Object;
use flamestorm::unwind::{Cfi, tree};
use std::time::{Duration, Instant};

/// Compilations of a file; the fastest counts, as the others were disturbed.
const REPEATS: usize = 5;

fn main() {
    println!(
        "{:<28} {:>9} {:>9} {:>6} {:>7} {:>9} {:>10} {:>10}  unsupported bytes by reason",
        "file", "text MiB", "rows", "rules", "blocks", "time ms", "covered %", "guessed %"
    );
    for path in std::env::args().skip(1) {
        match report(&path) {
            Ok(line) => println!("{line}"),
            Err(error) => println!("{path}: {error}"),
        }
    }
}

fn report(path: &str) -> Result<String, Box<dyn std::error::Error>> {
    let data = std::fs::read(path)?;
    let mut fastest = Duration::MAX;
    for _ in 0..REPEATS {
        let start = Instant::now();
        Cfi::new(&Object::parse(&data)?)?.compile()?;
        fastest = fastest.min(start.elapsed());
    }
    let table = Cfi::new(&Object::parse(&data)?)?.compile()?;
    let name = path.rsplit('/').next().unwrap_or(path);
    let share = 100.0 / table.text.max(1) as f64;
    let unsupported: u64 = table.unsupported.iter().sum();
    Ok(format!(
        "{name:<28} {:>9.2} {:>9} {:>6} {:>7} {:>9.2} {:>10.3} {:>10.3}  {:.4} % {:?}",
        table.text as f64 / 1048576.0,
        table.len(),
        table.rules().len(),
        tree::layout(&table)?.blocks(),
        fastest.as_secs_f64() * 1000.0,
        table.covered as f64 * share,
        table.guessed as f64 * share,
        unsupported as f64 * share,
        table.unsupported
    ))
}
