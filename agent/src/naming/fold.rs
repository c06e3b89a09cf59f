//! Shows stacks of async Rust as a programmer thinks of them.
//!
//! An async function runs at the bottom of a chain of polls. Between two functions that a programmer wrote
//! there are about ten of tokio, hyper, tower and the standard library that only pass the call on, and the
//! function itself is called `{{closure}}`. The rules here leave out the former and rename the latter. They
//! only look at demangled names.

use std::borrow::Cow;

/// Modules whose functions only call what they were given. A frame in one of them is left out, unless it is
/// the leaf. Modules that do work of their own are not listed, for example `tokio::runtime::io` (epoll),
/// `tokio::net` and `hyper::proto::h1::conn`.
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

/// Traits whose implementations for types of [`ADAPTERS`] only call what they wrap.
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

/// Crates that contain wrapper types. A type parameter (`F`, `&mut F`) counts as a wrapper too. A future of
/// any other crate does work of its own and is kept.
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

/// The name to show for a frame, or `None` if the frame is only plumbing.
///
/// `name` is a demangled Rust name. A name that no rule matches is returned unchanged, so names of other
/// languages may be passed too. `is_leaf` says whether the frame is the innermost of its stack (if that is
/// a kernel frame, no user frame is). The leaf is never left out, because the CPU time was spent there,
/// even if that was in `tokio::time`.
///
/// An async function and the closures in it get the same name, that of the function. Use [`fold`] to show
/// them only once in a stack.
pub fn readable(name: &str, is_leaf: bool) -> Option<Cow<'_, str>> {
    if !is_leaf && is_plumbing(name) {
        return None;
    }
    Some(shortened(name))
}

/// A stack, leaf first, without plumbing. For each frame that is kept it contains the frame's index in
/// `names` and the name to show. Where a function calls its own closures (`f`, `f::{{closure}}`), only the
/// innermost frame is kept. A function that calls itself is kept twice.
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

/// Whether a type is a wrapper: a type of [`ADAPTERS`], or a bare type parameter.
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
            // The `>` of `->` closes nothing.
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

/// The name without the suffixes that the compiler added.
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

    /// A recorded stack of the product service at the send of its query, root first.
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

    /// Folding leaves the functions that programmers wrote.
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

    /// Names that are kept, unchanged or shortened, including functions that do work of their own in the
    /// listed crates.
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
            // Either nothing would be left, or the suffix is not the compiler's.
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

    /// Plumbing is also recognized in the new mangling, which spells out all types.
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

    /// A leaf is kept even if it is plumbing, because the CPU time was spent in it.
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

    /// Recursive calls are not mistaken for a function and its closures.
    #[test]
    fn recursion_stays() {
        let walk = "shop::walk::{{closure}}";
        assert_eq!(fold(&[walk, walk, "shop::walk"]).len(), 2);
        assert_eq!(fold(&["shop::walk", "shop::walk"]).len(), 2);
        assert_eq!(fold(&["shop::walk", walk]).len(), 2);
    }
}
