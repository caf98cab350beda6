//! Values that must not be printed.

use std::fmt;

use url::Url;

/// A secret text. It has no `Display` and no `Serialize`, and its `Debug` hides it, so that no log
/// line, error or dump of the configuration contains it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The value itself. The caller is responsible for where it goes.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

/// A URL that may contain secrets in its userinfo, path or query. It prints as its origin alone:
/// scheme, host and port.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretUrl(Url);

impl SecretUrl {
    pub fn new(url: Url) -> Self {
        Self(url)
    }

    /// The whole URL. The caller is responsible for where it goes.
    pub fn expose(&self) -> &Url {
        &self.0
    }

    /// The origin and the path, for commands about this one URL. Userinfo, query and fragment are
    /// left out, and the parts of the path that may be tokens, since some services put theirs
    /// there.
    pub fn with_path(&self) -> String {
        let path: Vec<&str> = self
            .0
            .path()
            .split('/')
            .map(|part| if may_be_token(part) { "[redacted]" } else { part })
            .collect();
        format!("{}{}", self.origin(), path.join("/"))
    }

    fn origin(&self) -> String {
        let port = self.0.port().map(|p| format!(":{p}")).unwrap_or_default();
        format!("{}://{}{port}", self.0.scheme(), self.0.host_str().unwrap_or_default())
    }
}

/// The least characters of a part of a path that may be a token; a shorter token could be guessed.
const TOKEN: usize = 16;

/// Whether a part of a path may be a token, unlike short words such as `hooks`, `audit-events` and
/// `v1`.
fn may_be_token(part: &str) -> bool {
    let word = |w: &str| w.len() < TOKEN && w.bytes().all(|b| b.is_ascii_lowercase());
    part.len() >= TOKEN && !part.split(['-', '_', '.']).all(word)
}

impl fmt::Display for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.origin())
    }
}

impl fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_secret_is_ever_printed() {
        let secret = Secret::new("hunter2");
        assert_eq!(format!("{secret:?} {:#?}", vec![&secret]), "[redacted] [\n    [redacted],\n]");
        let url =
            SecretUrl::new("https://u:p@example.com:8443/hook/TOKEN?k=v#f".parse().expect("a URL"));
        assert_eq!(format!("{url} {url:?}"), "https://example.com:8443 https://example.com:8443");
        assert_eq!(url.with_path(), "https://example.com:8443/hook/TOKEN");
        let amqp = SecretUrl::new("amqp://guest:guest@broker/vhost".parse().expect("a URL"));
        assert_eq!(amqp.to_string(), "amqp://broker");
    }

    #[test]
    fn a_path_is_shown_without_what_looks_like_a_token() {
        for (path, shown) in [
            ("/", "/"),
            ("/hooks/v1/audit-events.jsonl", "/hooks/v1/audit-events.jsonl"),
            ("/customer-notification-endpoints", "/customer-notification-endpoints"),
            (
                "/services/T00000000/B00000000/XXXXXXXXXXXXXXXXXXXXXXXX",
                "/services/T00000000/B00000000/[redacted]",
            ),
            ("/api/webhooks/123456789012345678/aB3-_dEfG", "/api/webhooks/[redacted]/aB3-_dEfG"),
            ("/h/6fa459ea-ee8a-3ca4-894e-db77e160355e/in", "/h/[redacted]/in"),
            ("/abcdefghijklmnopqrstuvwxyz", "/[redacted]"),
            ("/%C3%A4%C3%A4%C3%A4%C3%A4", "/[redacted]"),
        ] {
            let url = SecretUrl::new(
                format!("https://u:p@example.com{path}?key=v#f").parse().expect("a URL"),
            );
            assert_eq!(url.with_path(), format!("https://example.com{shown}"));
        }
    }
}
