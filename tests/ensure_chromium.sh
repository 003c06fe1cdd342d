#!/usr/bin/env bash
# The browser tests need Chromium. Install it where the system's package manager can; elsewhere say so: the tests are
# then skipped, or fail where CI=true.
set -u
for name in chromium chromium-browser google-chrome; do command -v "$name" >/dev/null && exit 0; done
[ -x "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome" ] && exit 0
sudo=""
[ "$(id -u)" -ne 0 ] && command -v sudo >/dev/null && sudo="sudo -n"
if command -v apt-get >/dev/null; then
  echo "installing Chromium for the browser tests"
  $sudo apt-get update -qq && $sudo apt-get install -y -qq chromium >/dev/null && exit 0
fi
echo "WARNING: Chromium is missing and could not be installed; the browser tests will be skipped." >&2
exit 0
