//! `tenant` of a subscriber.

use crate::{
    config::{document::Section, reader::Reader, settings::QueueConfig},
    event::{NotATenant, Tenant},
};

/// Which tenants subscribers may have.
#[derive(Debug, Clone, Copy)]
pub(in crate::config) enum Tenants {
    /// That could not be read, which is reported already.
    Unread,
    None,
    Optional,
    Required,
}

impl Tenants {
    pub(in crate::config) fn of(queue: Option<&QueueConfig>) -> Self {
        let Some(QueueConfig { embedded, .. }) = queue else { return Self::Unread };
        match (&embedded.tenant, embedded.tenants_required) {
            (None, _) => Self::None,
            (Some(_), false) => Self::Optional,
            (Some(_), true) => Self::Required,
        }
    }
}

pub(super) fn tenant(
    reader: &Reader<'_>,
    section: &Section<'_>,
    tenants: Tenants,
) -> Option<Option<Tenant>> {
    let Some(value) = section.get("tenant") else {
        if matches!(tenants, Tenants::Required) {
            reader.report_missing(
                section,
                "tenant",
                "is required by [queue] tenants = \"required\": without it the subscriber would get the events of all tenants",
            );
            return None;
        }
        return Some(None);
    };
    let text = reader.string(&value)?;
    let tenant: Option<Tenant> =
        text.parse().map_err(|e: NotATenant| reader.report(&value, e.to_string())).ok();
    if matches!(tenants, Tenants::None) {
        reader.report(&value, "needs [queue] tenant, which says where the tenant of an event is; set that, such as to { pointer = \"/account_id\" }, or leave `tenant` out");
        return None;
    }
    tenant.map(Some)
}
