//! The tokens of `[admin]`.

use crate::{
    config::{
        document::{Section, Value},
        keys,
        reader::Reader,
        settings::{AdminConfig, Role, Token},
    },
    crypto::secret::Secret,
    delivery::SubscriberName,
};

/// The most tokens: each request is compared with all.
const MAX_TOKENS: usize = 100;

/// Reads a token's value.
pub(super) fn secret(reader: &Reader<'_>, value: &Value<'_>) -> Option<Secret> {
    let text = reader.string(value)?;
    // Not quoted: a rejected token is a secret too.
    let ok = !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
    if !ok {
        reader.report(value, "must be one or more visible ASCII characters without spaces, which is what a header can carry; leave the key out for no token");
    }
    ok.then(|| Secret::new(text))
}

/// Reads `[[admin.tokens]]`; `own` is `[admin] token`.
pub(super) fn tokens(
    reader: &Reader<'_>,
    value: &Value<'_>,
    own: Option<&Secret>,
) -> Option<Vec<Token>> {
    let tables = reader.array(value)?;
    if tables.len() > MAX_TOKENS {
        reader.report(value, format!("must have at most {MAX_TOKENS} tokens"));
        return None;
    }
    let mut found: Vec<Token> = Vec::new();
    let mut all_are_valid = true;
    for table in &tables {
        match token(reader, table, own, &found) {
            Some(token) => found.push(token),
            None => all_are_valid = false,
        }
    }
    all_are_valid.then_some(found)
}

fn token(
    reader: &Reader<'_>,
    table: &Value<'_>,
    own: Option<&Secret>,
    before: &[Token],
) -> Option<Token> {
    let section = reader.section(table, keys::TOKEN)?;
    let name = name(reader, &section, before);
    let secret = match section.get("token") {
        None => {
            reader.report_missing(
                &section,
                "token",
                "is required, such as \"${HOOKTRAIL_READ_TOKEN}\"",
            );
            None
        }
        Some(value) => secret(reader, &value).filter(|secret| {
            let same = before.iter().find(|token| token.secret == *secret);
            let same = same.map(|token| &*token.name);
            let same = same.or((own == Some(secret)).then_some(AdminConfig::TOKEN));
            if let Some(name) = same {
                reader.report(
                    &value,
                    format!(
                        "is the same as the token `{name}`; each token needs a value of its own"
                    ),
                );
            }
            same.is_none()
        }),
    };
    let role = match section.get("role") {
        // No default: it would be a surprise, either way.
        None => {
            reader.report_missing(
                &section,
                "role",
                "is required: \"admin\", \"read\" or \"intake\"",
            );
            None
        }
        role => {
            let words = [Role::Admin, Role::Read, Role::Intake].map(|role| (role.name(), role));
            reader.one_of(role, &words)
        }
    };
    Some(Token { name: name?, secret: secret?, role: role? })
}

/// Reads the name, which follows the rules of a subscriber's.
fn name(
    reader: &Reader<'_>,
    section: &Section<'_>,
    before: &[Token],
) -> Option<std::sync::Arc<str>> {
    let Some(value) = section.get("name") else {
        reader.report_missing(
            section,
            "name",
            "is required: 1 to 64 of a-z, 0-9 and `-`; operations are recorded with it",
        );
        return None;
    };
    let text = reader.string(&value)?;
    let wrong = match SubscriberName::try_new(&text) {
        Err(why) => Some(why.to_string()),
        Ok(_) if text == AdminConfig::TOKEN => {
            Some(format!("`{text}` is the name of the key `token` of [admin]"))
        }
        Ok(_) if before.iter().any(|token| *token.name == *text) => {
            Some(format!("`{text}` is already the name of another token; names are unique"))
        }
        Ok(_) => None,
    };
    match wrong {
        Some(why) => {
            reader.report(&value, why);
            None
        }
        None => Some(text.into()),
    }
}
