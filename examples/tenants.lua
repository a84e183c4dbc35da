-- What wrk asks the shop of examples/tenants_app.py for: every other visitor wants one of 50 popular tenants; the others
-- walk through all 2,000 of them, eight at a time at the same tenant.

local tenants, popular, users = 2000, 50, 200
local regions = { "eu", "uk", "jp", "us" }
local asked = 0

function request()
  asked = asked + 1
  local tenant = math.random(popular)
  if asked % 2 == 0 then
    tenant = math.floor(asked / 16) % tenants + 1
  end
  local region = regions[math.random(#regions)]
  return wrk.format("GET", string.format("/shop/%s/t%04d?user=%d", region, tenant, math.random(users)))
end
