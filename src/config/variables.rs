//! Environment variables in strings.

/// The begin of a reference to a variable.
pub(super) const REFERENCE: &str = "${";

/// Replaces `${VAR}` and `${VAR:-default}`; `$${` is a literal `${`.
pub(super) fn interpolate(
    text: &str,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(REFERENCE) {
        if at > 0 && rest.as_bytes()[at - 1] == b'$' {
            out.push_str(&rest[..at - 1]);
            out.push_str("${");
            rest = &rest[at + 2..];
            continue;
        }
        out.push_str(&rest[..at]);
        let body = &rest[at + 2..];
        let end =
            body.find('}').ok_or("`${` has no closing `}`; write `$${` for a literal `${`")?;
        let (name, default) = match body[..end].split_once(":-") {
            Some((name, default)) => (name, Some(default)),
            None => (&body[..end], None),
        };
        if default.is_some_and(|default| default.contains("${")) {
            return Err(
                "a default cannot hold another `${…}`: it would be taken as it is written; give the value itself, or none".to_owned()
            );
        }
        let first = name.chars().next();
        if !first.is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
            || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        {
            return Err("the name in `${…}` is not that of an environment variable; write `${NAME}` or `${NAME:-default}`".to_owned());
        }
        match (env(name), default) {
            (Some(value), None) => out.push_str(&value),
            (Some(value), Some(_)) if !value.is_empty() => out.push_str(&value),
            (_, Some(default)) => out.push_str(default),
            (None, None) => {
                return Err(format!(
                    "environment variable {name} is not set; set it, or give a default: `${{{name}:-…}}`"
                ));
            }
        }
        rest = &body[end + 1..];
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn environment_variables_are_replaced_once() {
        let env = |name: &str| match name {
            "A" => Some("${B}".to_owned()),
            "EMPTY" => Some(String::new()),
            _ => None,
        };
        for (text, expected) in [
            ("x", Ok("x")),
            ("${A}", Ok("${B}")),
            ("a${A}b${A}", Ok("a${B}b${B}")),
            ("${NOPE:-d}", Ok("d")),
            ("${EMPTY:-d}", Ok("d")),
            ("${EMPTY}", Ok("")),
            ("${NOPE:-}", Ok("")),
            ("$${A}", Ok("${A}")),
            ("$A $", Ok("$A $")),
            ("${NOPE}", Err("NOPE is not set")),
            ("${A", Err("no closing")),
            ("${}", Err("not that of an environment variable")),
            ("${1A}", Err("not that of an environment variable")),
            ("${NOPE:-${B}}", Err("a default cannot hold another")),
            ("${A:-${B}}", Err("a default cannot hold another")),
            ("x${A:-y${B:-z}}", Err("a default cannot hold another")),
        ] {
            match (interpolate(text, &env), expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected),
                (Err(found), Err(part)) => assert!(found.contains(part), "{found}"),
                (found, _) => panic!("{text}: {found:?}"),
            }
        }
    }
}
