//! The ground of the tests: a broker, daemons as real processes, receivers that answer as a test
//! says.

#![allow(dead_code, unused_macros, unused_imports, reason = "the benchmarks use a part of it")]

pub(crate) mod api;
pub(crate) mod broker;
pub(crate) mod daemon;
pub(crate) mod impostor;
pub(crate) mod queue;
pub(crate) mod raw;
pub(crate) mod raw_amqp;
pub(crate) mod raw_http2;
pub(crate) mod receiver;
pub(crate) mod snapshot;
pub(crate) mod tap;
pub(crate) mod tls;
pub(crate) mod wire;

use std::{
    collections::BTreeSet,
    future::Future,
    sync::Mutex,
    time::{Duration, Instant},
};

/// Makes of each `fn name()` a test in a module that says what it needs: `broker::name`, or
/// `tools::name` for what `scripts/verifiers` installs, or `root::name`. `scripts/test --quick` leaves
/// out these three and `amqp`; see [`assert_not_quick`].
macro_rules! tests_that_need {
    ($what:ident: $($name:ident),+ $(,)?) => {
        mod $what {
            $(#[test]
            fn $name() {
                super::$name();
            })+
        }
    };
}

pub(crate) use tests_that_need;

/// Fails a test that uses a broker or a tool outside the modules that `scripts/test --quick` leaves
/// out: so a test that needs one cannot be among those that it runs. A test is known by the name of
/// its thread; other threads pass, as those of benchmarks.
pub(crate) fn assert_not_quick(uses: &str) {
    const LEFT_OUT: [&str; 4] = ["amqp", "broker", "root", "tools"];
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("main");
    let is_test =
        name != "main" && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b':');
    assert!(
        !is_test || name.split("::").any(|part| LEFT_OUT.contains(&part)),
        "`{name}` needs what `scripts/test --quick` does without: name it in `tests_that_need!({uses}: ...)`, not `#[test]`"
    );
}

/// The longest wait for a condition before its test fails: far more than it ever takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

/// Waits until `condition` holds; fails the test with `what` if it does not in time.
pub(crate) async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !condition().await {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Runs a test's body on a runtime of its own.
pub(crate) fn run(test: impl Future<Output = ()>) {
    // The tests and the program's client library use the same TLS provider; the second test to come
    // here finds it installed.
    rustls::crypto::ring::default_provider().install_default().ok();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(test);
}

/// The most memory that a process ever had, in MiB.
pub(crate) fn peak_mib(pid: u32) -> f64 {
    try_peak_mib(pid).expect("the process runs")
}

/// Like [`peak_mib`]; `None` for a process that has ended.
pub(crate) fn try_peak_mib(pid: u32) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(peak.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") / 1024.0)
}

/// A number that no other test uses.
pub(crate) fn unique() -> String {
    format!("{:08x}", rand::random::<u32>())
}

/// A port that is free now. Not one of those that the system gives to outgoing connections:
/// another test's connection could take it before it is used. And none twice: it may be that of a
/// node that is just being started again.
pub(crate) fn free_port() -> u16 {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    loop {
        let port = rand::random_range(15_000..32_000);
        let is_new = GIVEN.lock().expect("no panic with it held").insert(port);
        if is_new && std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
