//! The process's file descriptors, ports and buffers. A lack of them is no receiver's failure.

use std::{
    collections::BTreeMap,
    io::Error,
    os::fd::AsFd as _,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    process::{Resource, Rlimit, getrlimit, setrlimit},
};

/// The shortest time between two log lines about the same lack.
const REPORT_INTERVAL: Duration = Duration::from_secs(60);

/// The name of this machine, by which deliveries say which daemon made an attempt.
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Raises the limit of open files to what the system allows this process. Many start with 1,024,
/// which a few hundred receivers use up. Returns the limit, or `None` if there is none.
pub fn raise_open_files() -> Option<u64> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum
        && setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).is_err()
    {
        return current;
    }
    maximum
}

/// What this process or its machine lacks, if that is the cause of a socket's error.
pub fn lacking(e: &Error) -> Option<&'static str> {
    let errno = Errno::from_raw_os_error(e.raw_os_error()?);
    let what = match errno {
        Errno::MFILE => {
            "this process has no file descriptor left (EMFILE): raise LimitNOFILE= of its unit, or `ulimit -n`"
        }
        Errno::NFILE => "the system has no file descriptor left (ENFILE): raise fs.file-max",
        Errno::NOBUFS => "the system has no buffer left for a connection (ENOBUFS)",
        Errno::NOMEM => "the system has no memory left for a connection (ENOMEM)",
        Errno::ADDRNOTAVAIL => {
            "the system has no port left to connect from (EADDRNOTAVAIL): widen net.ipv4.ip_local_port_range, or let receivers \
             keep connections open"
        }
        _ => return None,
    };
    Some(what)
}

/// What is lacking to open a file now. A resolver that could open no socket reports only that it
/// failed.
pub fn without_descriptors() -> Option<&'static str> {
    lacking(&std::io::stderr().as_fd().try_clone_to_owned().err()?)
}

/// When each of the few reasons was logged last.
#[derive(Debug, Default)]
struct Reports(BTreeMap<String, Instant>);

impl Reports {
    /// Whether the reason is to be logged now.
    fn is_due(&mut self, what: &str, now: Instant) -> bool {
        let due =
            self.0.get(what).is_none_or(|at| now.saturating_duration_since(*at) >= REPORT_INTERVAL);
        if due {
            self.0.insert(what.to_owned(), now);
        }
        due
    }
}

/// Logs why requests cannot be sent, each reason once a minute for all requests and subscribers
/// together. The status has it for each subscriber.
pub fn report(subscriber: &str, what: &str, now: Instant) {
    static REPORTS: Mutex<Reports> = Mutex::new(Reports(BTreeMap::new()));
    if REPORTS.lock().unwrap_or_else(PoisonError::into_inner).is_due(what, now) {
        tracing::error!(
            subscriber,
            error = what,
            "requests cannot be sent; they are no attempts, and their events wait in the queue"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lack_of_this_process_is_distinguished_from_what_a_receiver_does() {
        for (errno, part) in [
            (Errno::MFILE, "EMFILE"),
            (Errno::NFILE, "ENFILE"),
            (Errno::ADDRNOTAVAIL, "EADDRNOTAVAIL"),
        ] {
            let what = lacking(&Error::from_raw_os_error(errno.raw_os_error())).expect("a lack");
            assert!(what.contains(part), "{what}");
        }
        for errno in [Errno::CONNREFUSED, Errno::CONNRESET, Errno::HOSTUNREACH, Errno::TIMEDOUT] {
            assert_eq!(lacking(&Error::from_raw_os_error(errno.raw_os_error())), None, "{errno}");
        }
        assert_eq!(lacking(&Error::other("EMFILE")), None);
    }

    #[test]
    fn each_lack_is_logged_once_a_minute() {
        let (mut reports, now) = (Reports::default(), crate::clock::instant());
        assert!(
            reports.is_due("EMFILE", now) && !reports.is_due("EMFILE", now + REPORT_INTERVAL / 2)
        );
        assert!(reports.is_due("no stream", now + REPORT_INTERVAL / 2), "another reason");
        assert!(
            reports.is_due("EMFILE", now + REPORT_INTERVAL)
                && !reports.is_due("no stream", now + REPORT_INTERVAL)
        );
    }

    #[test]
    fn the_limit_of_open_files_is_what_the_system_allows() {
        let most = getrlimit(Resource::Nofile).maximum;
        assert_eq!(raise_open_files(), most);
        assert_eq!(getrlimit(Resource::Nofile).current, most);
    }
}
