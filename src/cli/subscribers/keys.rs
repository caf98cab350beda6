//! The keys of a subscriber, from the command line, from files and from standard input.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};
use url::Url;

use crate::{
    cli::{failed::Failed, text::visible},
    config::managed::Document,
    crypto::secret::SecretUrl,
    event::{Pattern, Tenant},
};

/// The most bytes of a file with keys, a URL or a secret.
const MAX_FILE: u64 = 64 * 1024;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Keys {
    /// A file with keys of `[[subscriber]]` as a JSON object; `-` is standard input
    ///
    /// This is the place for headers and auth, and for every key without an option here. What the
    /// options say wins.
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    from: Option<PathBuf>,
    /// Where its requests go
    ///
    /// Others on this machine see the arguments of a command: a URL with a secret is refused here.
    #[arg(long, value_name = "URL", conflicts_with = "url_file")]
    url: Option<String>,
    /// A file with the URL; `-` is standard input
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    url_file: Option<PathBuf>,
    /// The events that it gets; give it once for each pattern
    #[arg(long, value_name = "PATTERN", value_parser = Pattern::try_new)]
    events: Vec<Pattern>,
    /// The tenant whose events it gets, and no others; only for a new one
    #[arg(long, value_name = "TENANT")]
    tenant: Option<Tenant>,
    /// What a request's body is: `json`, `jsonl`, `json_array`, `single`, `splunk_hec`,
    /// `cloudevents_batch` or `slack`
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,
    /// What it is for
    #[arg(long, value_name = "TEXT")]
    description: Option<String>,
    /// A file with a signing secret, such as one of `hooktrail secret`; `-` is standard input. Give
    /// it once for each
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    secret_file: Vec<PathBuf>,
}

impl Keys {
    /// All keys that are given, and a null for those that are to be removed.
    pub(super) fn read(&self, removed: &[String]) -> Result<Document, Failed> {
        let mut keys = self.given()?;
        unset(&mut keys, removed)?;
        Ok(keys.into())
    }

    fn given(&self) -> Result<Map<String, Value>, Failed> {
        let files = self.from.iter().chain(&self.url_file).chain(&self.secret_file);
        if files.filter(|file| is_stdin(file)).count() > 1 {
            let why = "only one file can be standard input, `-`";
            return Err(Failed::Usage(why.to_owned()));
        }
        let mut keys = self.from.as_deref().map(object).transpose()?.unwrap_or_default();
        let mut set = |key: &str, value: Value| drop(keys.insert(key.to_owned(), value));
        if let Some(url) = &self.url {
            has_no_secret(url)?;
            set("url", json!(url));
        }
        if let Some(file) = &self.url_file {
            set("url", json!(line(file)?));
        }
        if !self.events.is_empty() {
            set("events", self.events.iter().map(Pattern::as_str).collect());
        }
        if let Some(tenant) = &self.tenant {
            set("tenant", json!(tenant.as_str()));
        }
        if let Some(format) = &self.format {
            set("format", json!(format));
        }
        if let Some(description) = &self.description {
            set("description", json!(description));
        }
        if !self.secret_file.is_empty() {
            let secrets = self.secret_file.iter().map(|file| line(file));
            set("secrets", secrets.collect::<Result<Vec<_>, _>>()?.into());
        }
        Ok(keys)
    }
}

/// Adds what a merge patch says of keys that are removed, such as `batch.max_events`.
fn unset(keys: &mut Map<String, Value>, paths: &[String]) -> Result<(), Failed> {
    for path in paths {
        let both = || Failed::Usage(format!("`{}` is set and removed at once", visible(path)));
        let (groups, key) = path.rsplit_once('.').unwrap_or(("", path));
        let mut at = &mut *keys;
        for group in groups.split('.').filter(|group| !group.is_empty()) {
            let entry = at.entry(group).or_insert_with(|| Map::new().into());
            at = entry.as_object_mut().ok_or_else(both)?;
        }
        if at.insert(key.to_owned(), Value::Null).is_some() {
            return Err(both());
        }
    }
    Ok(())
}

fn is_stdin(file: &Path) -> bool {
    file == Path::new("-")
}

/// The text of a file. An error names the file and quotes nothing of it.
fn text(file: &Path) -> Result<String, Failed> {
    let (mut text, name) = (String::new(), file.display());
    let read = if is_stdin(file) {
        std::io::stdin().take(MAX_FILE + 1).read_to_string(&mut text)
    } else {
        std::fs::File::open(file).and_then(|f| f.take(MAX_FILE + 1).read_to_string(&mut text))
    };
    match read {
        Err(e) => Err(Failed::Usage(format!("{name} cannot be read: {e}"))),
        Ok(n) if n as u64 > MAX_FILE => {
            Err(Failed::Usage(format!("{name} has more than {MAX_FILE} bytes")))
        }
        Ok(_) => Ok(text),
    }
}

/// The only line of a file.
fn line(file: &Path) -> Result<String, Failed> {
    let text = text(file)?;
    let line = text.trim();
    if line.is_empty() || line.contains('\n') {
        let why = format!("{} must have one line, with the value alone", file.display());
        return Err(Failed::Usage(why));
    }
    Ok(line.to_owned())
}

fn object(file: &Path) -> Result<Map<String, Value>, Failed> {
    let wrong = |what: String| {
        let shape = "write the keys as a JSON object, such as {\"url\":\"https://…\"}";
        Failed::Usage(format!("{} {what}; {shape}", file.display()))
    };
    // A mistake of the syntax is told with its place, and without what stands there.
    let read = serde_json::from_str(&text(file)?).map_err(|e| wrong(format!("is no JSON: {e}")))?;
    match read {
        Value::Object(keys) => Ok(keys),
        _ => Err(wrong("has another value".to_owned())),
    }
}

/// An error if a URL has parts that may be secret.
fn has_no_secret(text: &str) -> Result<(), Failed> {
    let why = match text.parse::<Url>() {
        Ok(url) if SecretUrl::new(url.clone()).with_path() == url.as_str() => return Ok(()),
        Ok(_) => {
            "--url: user, query, fragment and long parts of a path may be secret, and others on this machine see the arguments of a \
             command; put the URL into a file for --url-file, or pipe it to --url-file -"
        }
        Err(_) => "--url: this is not a URL; write one such as https://siem.example/hook",
    };
    Err(Failed::Usage(why.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_with_what_may_be_secret_is_refused_and_not_quoted() {
        for url in ["https://siem.example/hook", "https://siem.example", "http://10.0.0.1:8080/"] {
            assert!(has_no_secret(url).is_ok(), "{url}");
        }
        for url in [
            "https://u:hunter2@siem.example/",
            "https://siem.example/?k=hunter2",
            "https://siem.example/#hunter2",
            "https://siem.example/hunter2hunter2hunter2",
            "hunter2",
        ] {
            let why = has_no_secret(url).expect_err(url);
            assert!(why.exit_code() == 2 && !why.to_string().contains("hunter2"), "{why}");
        }
    }

    #[test]
    fn keys_are_removed_by_their_paths() {
        let mut keys = json!({ "url": "x", "batch": { "max_wait": "1s" } });
        let keys = keys.as_object_mut().expect("an object");
        let paths = ["auth", "batch.max_events", "http.timeout"].map(str::to_owned);
        unset(keys, &paths).expect("others are set");
        let expected = json!({
            "url": "x", "auth": null, "batch": { "max_wait": "1s", "max_events": null }, "http": { "timeout": null },
        });
        assert_eq!(Value::Object(keys.clone()), expected);
        for both in ["url", "url.x", "batch.max_wait"] {
            assert!(unset(keys, &[both.to_owned()]).is_err(), "{both}");
        }
    }

    #[test]
    fn a_file_has_one_line_or_an_object_and_an_error_quotes_nothing_of_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("f");
        let written = |text: &str| std::fs::write(&file, text).expect("writes");
        written("  whsec_x\r\n");
        assert_eq!(line(&file).expect("a line"), "whsec_x");
        for text in
            ["", "\n", "hunter2\nhunter2", "[\"hunter2\"]", "{\"a\": hunter2}", "\"hunter2\""]
        {
            written(text);
            let wrong = [line(&file).err(), object(&file).err()];
            assert!(wrong[1].is_some(), "{text}");
            for why in wrong.into_iter().flatten() {
                assert!(!why.to_string().contains("hunter2"), "{why}");
            }
        }
        written(&"x".repeat(64 * 1024 + 1));
        assert!(line(&file).expect_err("too long").to_string().contains("65536 bytes"));
    }
}
