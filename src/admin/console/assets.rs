//! The style sheet, the module and the icon of the pages, part of the program.

use std::sync::LazyLock;

use axum::{
    Router,
    http::header,
    response::{IntoResponse as _, Response},
    routing::get,
};
use sha2::{Digest as _, Sha256};

/// A file under a path that changes with its content, so that browsers may keep it for ever.
pub(super) struct Asset {
    pub(super) path: String,
    media_type: &'static str,
    content: &'static str,
}

impl Asset {
    fn new(name: &str, media_type: &'static str, content: &'static str) -> Self {
        let digest: String =
            Sha256::digest(content).iter().take(6).map(|b| format!("{b:02x}")).collect();
        let (stem, extension) = name.split_once('.').unwrap_or((name, ""));
        Self { path: format!("/console/assets/{stem}-{digest}.{extension}"), media_type, content }
    }

    fn answer(&self) -> Response {
        const KEPT: &str = "public, max-age=31536000, immutable";
        let headers = [(header::CONTENT_TYPE, self.media_type), (header::CACHE_CONTROL, KEPT)];
        (headers, self.content).into_response()
    }
}

pub(super) static STYLE: LazyLock<Asset> = LazyLock::new(|| {
    Asset::new("console.css", "text/css; charset=utf-8", include_str!("assets/console.css"))
});

pub(super) static MODULE: LazyLock<Asset> = LazyLock::new(|| {
    Asset::new("console.js", "text/javascript; charset=utf-8", include_str!("assets/console.js"))
});

pub(super) static ICON: LazyLock<Asset> =
    LazyLock::new(|| Asset::new("icon.svg", "image/svg+xml", include_str!("assets/icon.svg")));

/// The routes, which need no session: the page of the sign-in has them too.
pub(super) fn routes() -> Router {
    [&STYLE, &MODULE, &ICON].into_iter().fold(Router::new(), |router, asset| {
        router.route(&asset.path, get(async || asset.answer()))
    })
}
