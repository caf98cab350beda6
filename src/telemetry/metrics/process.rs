//! What this process uses of the machine, as far as the system says: Linux does, in /proc.

/// `None` of what is not known.
#[derive(Debug, Clone, Copy)]
pub(super) struct Usage {
    pub(super) cpu_seconds: Option<f64>,
    pub(super) resident_bytes: Option<f64>,
    pub(super) threads: Option<f64>,
    pub(super) open_fds: Option<f64>,
}

impl Usage {
    pub(super) fn now() -> Self {
        let read =
            |file: &str| std::fs::read_to_string(format!("/proc/self/{file}")).unwrap_or_default();
        let status = read("status");
        let field = |name: &str| {
            status
                .lines()
                .find_map(|l| l.strip_prefix(name)?.split_whitespace().next()?.parse::<f64>().ok())
        };
        let open_fds = std::fs::read_dir("/proc/self/fd").ok();
        Self {
            cpu_seconds: cpu_seconds(&read("stat")),
            resident_bytes: field("VmRSS:").map(|kib| kib * 1024.0),
            threads: field("Threads:"),
            // One of them reads the folder.
            open_fds: open_fds.map(|fds| fds.count().saturating_sub(1) as f64),
        }
    }
}

/// User and system time from the text of /proc/self/stat, whose second field may hold anything in
/// its brackets.
fn cpu_seconds(stat: &str) -> Option<f64> {
    // Linux counts these in hundredths for every program, whatever the kernel's own clock is.
    const TICKS_PER_SECOND: f64 = 100.0;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<f64>().ok();
    Some((ticks()? + ticks()?) / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usage_of_this_process_is_read() {
        let usage = Usage::now();
        assert!(usage.resident_bytes.is_some_and(|bytes| bytes > 1e6), "{usage:?}");
        assert!(usage.open_fds.is_some_and(|fds| fds >= 3.0), "{usage:?}");
        assert!(usage.threads.is_some_and(|threads| threads >= 1.0), "{usage:?}");
        assert!(usage.cpu_seconds.is_some(), "{usage:?}");
    }

    #[test]
    fn cpu_time_is_read_behind_the_name_whatever_is_in_it() {
        assert_eq!(cpu_seconds("1 (a) b) R 0 0 0 0 0 0 0 0 0 0 150 50 0 0"), Some(2.0));
    }
}
