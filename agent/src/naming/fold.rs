//! Stacks of async Rust as a programmer thinks of them.
//!
//! An async function runs at the bottom of a chain of polls: between two functions that somebody
//! wrote stand ten of tokio, hyper, tower and the standard library that only pass the call on. And
//! the function itself is called `{{closure}}`. Here are the rules that leave out the one and rename
//! the other; they look at nothing but demangled names.

use std::borrow::Cow;

/// Modules whose functions only call what they were given. A frame of these is left out unless it is
/// the leaf. What does work of its own is not here: `tokio::runtime::io` (epoll), `tokio::net`,
/// `hyper::proto::h1::conn`.
const PLUMBING: [&str; 34] = [
    "axum::handler::",
    "axum::middleware::",
    "axum::routing::",
    "axum::util::",
    "axum_server::server::",
    "core::future::",
    "core::ops::function::",
    "core::panic::unwind_safe::",
    "core::pin::",
    "either::",
    "futures_core::",
    "futures_util::future::",
    "futures_util::stream::",
    "hyper::proto::h1::dispatch::",
    "hyper::server::conn::",
    "hyper_util::server::conn::",
    "hyper_util::service::",
    "pin_project::",
    "pin_project_lite::",
    "std::panic::catch_unwind",
    "std::panicking::catch_unwind",
    "std::panicking::try",
    "std::sys::backtrace::__rust_begin_short_backtrace",
    "std::sys::thread::",
    "std::thread::lifecycle::spawn_unchecked",
    "std::thread::local::LocalKey<T>::",
    "tokio::loom::",
    "tokio::runtime::blocking::",
    "tokio::runtime::context::",
    "tokio::runtime::scheduler::",
    "tokio::runtime::task::",
    "tokio::task::coop::",
    "tower::",
    "tracing::instrument::",
];

/// Traits whose implementations in [`ADAPTERS`] only call what they wrap.
const POLLED: [&str; 11] = [
    "axum::handler::Handler",
    "core::future::future::Future",
    "core::ops::function::Fn",
    "futures_core::future::TryFuture",
    "futures_core::stream::Stream",
    "futures_core::stream::TryStream",
    "futures_util::fns::Fn",
    "hyper::proto::h1::dispatch::Dispatch",
    "hyper::service::service::Service",
    "std::future::Future",
    "tower_service::Service",
];

/// Crates of wrappers, beside type parameters (`F`, `&mut F`). A future of any other crate is
/// somebody's work, and stays.
const ADAPTERS: [&str; 19] = [
    "alloc",
    "axum",
    "axum_core",
    "axum_server",
    "core",
    "either",
    "futures_core",
    "futures_util",
    "hyper",
    "hyper_util",
    "opentelemetry",
    "pin_project",
    "pin_project_lite",
    "std",
    "tokio",
    "tower",
    "tower_http",
    "tower_service",
    "tracing",
];

/// What a frame is called, or `None` where it is only plumbing.
///
/// `name` is a demangled Rust name; one that no rule knows comes back as it is, so names of other
/// languages may be given as well. `is_leaf` tells the innermost frame of a stack (a leaf may be a
/// kernel's frame; then no other is one): it is never left out, since the CPU time was spent there,
/// be it in `tokio::time`.
///
/// An async function and the closures in it get the function's name. To see each of them once in a
/// stack use [`fold`].
pub fn readable(name: &str, is_leaf: bool) -> Option<Cow<'_, str>> {
    if !is_leaf && is_plumbing(name) {
        return None;
    }
    Some(shortened(name))
}

/// A stack, leaf first, without plumbing: for each frame that stays its index in `names` and what it
/// is called. Where a function calls its own closures (`f`, `f::{{closure}}`) the innermost stays;
/// one that calls itself stays twice.
pub fn fold<'a>(names: &[&'a str]) -> Vec<(usize, Cow<'a, str>)> {
    let mut shown: Vec<(usize, Cow<'a, str>)> = Vec::new();
    let mut callee = "";
    for (index, &name) in names.iter().enumerate() {
        let Some(readable) = readable(name, index == 0) else {
            continue;
        };
        let is_closure = callee.len() > name.len() && callee.starts_with(name);
        let is_part = is_closure && shown.last().is_some_and(|(_, last)| *last == readable);
        callee = name;
        if !is_part {
            shown.push((index, readable));
        }
    }
    shown
}

fn is_plumbing(name: &str) -> bool {
    if let Some((implementor, of_trait)) = implementation(name) {
        let is_polled = POLLED.iter().any(|polled| of_trait.starts_with(polled));
        return is_polled && is_adapter(implementor);
    }
    // `<core::pin::Pin<P>>::as_mut` and `<T>::method` of the new mangling.
    let name = name.strip_prefix('<').unwrap_or(name);
    PLUMBING.iter().any(|module| name.starts_with(module))
}

/// A type that wraps another: one of [`ADAPTERS`], or nothing but a parameter.
fn is_adapter(implementor: &str) -> bool {
    let mut name = implementor;
    for prefix in ["&", "mut ", "dyn "] {
        name = name.strip_prefix(prefix).unwrap_or(name);
    }
    match name.split_once("::") {
        Some((root, _)) => ADAPTERS.contains(&root),
        None => !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric()),
    }
}

/// `A` and `B` of `<A as B>::method`.
fn implementation(name: &str) -> Option<(&str, &str)> {
    let inside = name.strip_prefix('<')?;
    let mut depth = 0;
    let mut last = b' ';
    for (at, byte) in inside.bytes().enumerate() {
        match byte {
            b'<' | b'(' | b'[' => depth += 1,
            // Not that of an arrow.
            b'>' if last != b'-' => depth -= 1,
            b')' | b']' => depth -= 1,
            b' ' if depth == 0 && inside[at..].starts_with(" as ") => {
                return Some((&inside[..at], &inside[at + " as ".len()..]));
            }
            _ => {}
        }
        if depth < 0 {
            return None;
        }
        last = byte;
    }
    None
}

/// The name without what the compiler added behind it.
fn shortened(name: &str) -> Cow<'_, str> {
    let mut short = name;
    loop {
        let before = short;
        short = without_hash(short);
        for suffix in ["::{{closure}}", "{{vtable.shim}}", "::{{constructor}}"] {
            short = short.strip_suffix(suffix).unwrap_or(short);
        }
        short = without_numbered(short);
        if short == before {
            return Cow::Borrowed(short);
        }
    }
}

/// Without `::h0123456789abcdef`.
fn without_hash(name: &str) -> &str {
    match name.rsplit_once("::h") {
        Some((short, hash))
            if hash.len() == 16 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()) =>
        {
            short
        }
        _ => name,
    }
}

/// Without `::{closure#0}`, `::{async_fn#0}`, `::{async_fn_env#0}`, `::{shim:vtable#0}` ….
fn without_numbered(name: &str) -> &str {
    const KINDS: [&str; 6] = [
        "closure",
        "async_",
        "coroutine",
        "gen_",
        "shim:",
        "constructor",
    ];
    let Some((short, kind)) = name
        .strip_suffix('}')
        .and_then(|name| name.rsplit_once("::{"))
    else {
        return name;
    };
    let is_numbered = kind.contains('#') && !kind.contains(['{', '}', ' ']);
    match is_numbered && KINDS.iter().any(|known| kind.starts_with(known)) {
        true => short,
        false => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A recorded stack of the product service that sends its query, root first.
    const SEARCH: &[&str] = &[
        "clone3",
        "start_thread",
        "<std::sys::thread::unix::Thread>::new::thread_start",
        "<alloc::boxed::Box<dyn core::ops::function::FnOnce<(), Output = ()> + core::marker::Send> as core::ops::function::FnOnce<()>>::call_once",
        "core::ops::function::FnOnce::call_once{{vtable.shim}}",
        "std::thread::lifecycle::spawn_unchecked::{{closure}}",
        "std::panic::catch_unwind",
        "std::panicking::catch_unwind",
        "std::panicking::catch_unwind::do_call",
        "<core::panic::unwind_safe::AssertUnwindSafe<F> as core::ops::function::FnOnce<()>>::call_once",
        "std::sys::backtrace::__rust_begin_short_backtrace",
        "tokio::runtime::blocking::pool::Spawner::spawn_thread::{{closure}}",
        "tokio::runtime::task::raw::RawTask::poll",
        "tokio::loom::std::unsafe_cell::UnsafeCell<T>::with_mut",
        "<tokio::runtime::blocking::task::BlockingTask<T> as core::future::future::Future>::poll",
        "std::thread::local::LocalKey<T>::try_with",
        "tokio::runtime::scheduler::multi_thread::worker::Context::run_task::{{closure}}",
        "tokio::task::coop::with_budget",
        "axum_server::server::Server<A,Acc>::serve::{{closure}}::{{closure}}::{{closure}}",
        "<core::future::poll_fn::PollFn<F> as core::future::future::Future>::poll",
        "<&mut F as core::future::future::Future>::poll",
        "<either::Either<L,R> as core::future::future::Future>::poll",
        "<core::pin::Pin<P> as core::future::future::Future>::poll",
        "<hyper_util::server::conn::auto::UpgradeableConnection<I,S,E> as core::future::future::Future>::poll",
        "hyper::proto::h1::dispatch::Dispatcher<D,Bs,I,T>::poll_catch",
        "<hyper::proto::h1::dispatch::Server<S,hyper::body::incoming::Incoming> as hyper::proto::h1::dispatch::Dispatch>::poll_msg",
        "<hyper_util::service::glue::TowerToHyperServiceFuture<S,R> as core::future::future::Future>::poll",
        "<tower::util::map_err::MapErrFuture<F,N> as core::future::future::Future>::poll",
        "<F as futures_core::future::TryFuture>::try_poll",
        "<axum::middleware::from_fn::FromFn<F,S,I,(T1,T2)> as tower_service::Service<http::request::Request<axum_core::body::Body>>>::call::{{closure}}",
        "<opentelemetry::context::future_ext::WithContext<T> as core::future::future::Future>::poll",
        "workload::services::product::time_limit::{{closure}}",
        "<tokio::time::timeout::Timeout<T> as core::future::future::Future>::poll",
        "axum::middleware::from_fn::Next::run::{{closure}}",
        "<F as axum::handler::Handler<(M,T1,T2),S>>::call::{{closure}}",
        "workload::services::product::search::{{closure}}",
        "workload::services::product::search_products_unindexed::{{closure}}",
        "sqlx_core::query_as::QueryAs<DB,O,A>::fetch_all::{{closure}}",
        "<futures_util::stream::try_stream::try_collect::TryCollect<St,C> as core::future::future::Future>::poll",
        "<S as futures_core::stream::TryStream>::try_poll_next",
        "<sqlx_core::ext::async_stream::TryAsyncStream<T> as futures_core::stream::Stream>::poll_next",
        "futures_util::future::future::FutureExt::poll_unpin",
        "<tracing::instrument::Instrumented<T> as core::future::future::Future>::poll",
        "sqlx_postgres::connection::executor::<impl sqlx_postgres::connection::PgConnection>::run::{{closure}}",
        "sqlx_core::net::socket::buffered::BufferedSocket<S>::flush::{{closure}}",
        "<alloc::boxed::Box<S> as sqlx_core::net::socket::Socket>::try_write",
        "tokio::net::tcp::stream::TcpStream::try_write",
        "tokio::net::tcp::stream::TcpStream::try_write::{{closure}}",
        "<&mio::net::tcp::stream::TcpStream as std::io::Write>::write",
        "__libc_send",
    ];

    /// What is left of it is what people wrote.
    #[test]
    fn a_recorded_stack() {
        let leaf_first: Vec<&str> = SEARCH.iter().rev().copied().collect();
        let folded = fold(&leaf_first);
        let names: Vec<&str> = folded.iter().rev().map(|(_, name)| &**name).collect();
        assert_eq!(
            names,
            [
                "clone3",
                "start_thread",
                "workload::services::product::time_limit",
                "workload::services::product::search",
                "workload::services::product::search_products_unindexed",
                "sqlx_core::query_as::QueryAs<DB,O,A>::fetch_all",
                "<sqlx_core::ext::async_stream::TryAsyncStream<T> as futures_core::stream::Stream>::poll_next",
                "sqlx_postgres::connection::executor::<impl sqlx_postgres::connection::PgConnection>::run",
                "sqlx_core::net::socket::buffered::BufferedSocket<S>::flush",
                "<alloc::boxed::Box<S> as sqlx_core::net::socket::Socket>::try_write",
                "tokio::net::tcp::stream::TcpStream::try_write",
                "<&mio::net::tcp::stream::TcpStream as std::io::Write>::write",
                "__libc_send",
            ]
        );
        for (index, name) in folded {
            assert!(leaf_first[index].starts_with(&*name));
        }
    }

    /// Names that stay, whole or shortened; also what does work of its own in the same crates.
    #[test]
    fn shown() {
        for (name, expected) in [
            ("shop::search::{{closure}}::{{closure}}", "shop::search"),
            ("shop::search::{async_fn#0}", "shop::search"),
            (
                "shop::search::{closure#12}::{async_block_env#0}",
                "shop::search",
            ),
            ("shop::search::h0123456789abcdef", "shop::search"),
            (
                "shop::search::{{closure}}::h0123456789abcdef",
                "shop::search",
            ),
            (
                "<shop::Query as core::future::future::Future>::poll",
                "<shop::Query as core::future::future::Future>::poll",
            ),
            (
                "<shop::Auth<S> as tower_service::Service<R>>::call",
                "<shop::Auth<S> as tower_service::Service<R>>::call",
            ),
            (
                "tokio::runtime::io::driver::Driver::turn",
                "tokio::runtime::io::driver::Driver::turn",
            ),
            (
                "tokio::net::tcp::stream::TcpStream::try_write",
                "tokio::net::tcp::stream::TcpStream::try_write",
            ),
            (
                "hyper::proto::h1::role::encode_headers",
                "hyper::proto::h1::role::encode_headers",
            ),
            (
                "<alloc::vec::Vec<T> as core::clone::Clone>::clone",
                "<alloc::vec::Vec<T> as core::clone::Clone>::clone",
            ),
            // Nothing would be left, or it is not the compiler's.
            ("{{closure}}", "{{closure}}"),
            ("{async_fn#0}", "{async_fn#0}"),
            ("shop::{impl#3}", "shop::{impl#3}"),
            ("shop::h01234567", "shop::h01234567"),
            // Other languages.
            ("std::vector<int>::clear()", "std::vector<int>::clear()"),
            ("ExecSeqScan", "ExecSeqScan"),
            ("operator<", "operator<"),
            ("<", "<"),
            ("", ""),
        ] {
            assert_eq!(readable(name, false).as_deref(), Some(expected), "{name}");
        }
    }

    /// Plumbing by the new mangling, with all types written out.
    #[test]
    fn hidden() {
        for name in [
            "<core::pin::Pin<&mut shop::Query<(u8,)>> as core::future::future::Future>::poll",
            "<alloc::boxed::Box<dyn core::ops::function::Fn(u8) -> u8> as core::ops::function::FnOnce<(u8,)>>::call_once::{shim:vtable#0}",
            "<tokio::runtime::task::core::Core<shop::search::{async_fn_env#0}, S>>::poll",
            "<&mut F as core::future::future::Future>::poll",
            "tokio::runtime::task::raw::poll::<shop::search::{async_fn_env#0}>",
        ] {
            assert_eq!(readable(name, false), None, "{name}");
        }
    }

    /// The CPU time was spent in the leaf, so it stays, whatever it is.
    #[test]
    fn leaves_stay() {
        for name in [
            "tokio::runtime::task::core::Header::set_next",
            "core::future::ready",
        ] {
            assert_eq!(readable(name, true).as_deref(), Some(name));
            assert_eq!(readable(name, false), None);
            assert_eq!(fold(&[name, name, "main"]).len(), 2);
        }
    }

    /// Recursion is no closure, however its frames are called.
    #[test]
    fn recursion_stays() {
        let walk = "shop::walk::{{closure}}";
        assert_eq!(fold(&[walk, walk, "shop::walk"]).len(), 2);
        assert_eq!(fold(&["shop::walk", "shop::walk"]).len(), 2);
        assert_eq!(fold(&["shop::walk", walk]).len(), 2);
    }
}
