//! The presets of subscribers.

/// The keys of `preset = "mailtrap"`, as Mailtrap's service sends. Precedence: subscriber, preset,
/// top level.
pub(super) const MAILTRAP: &str = r#"
signatures = ["mailtrap"]
batch = { max_events = 500, max_wait = "30s" }
http = { success = "200", timeout = "30s" }
circuit_breaker = { failures = 0 }
[retry]
max_attempts = 41
initial_interval = "5m"
multiplier = 1
randomization_factor = 0
max_interval = "5m"
max_elapsed_time = "0s"
on_exhausted = "pause"
"#;
